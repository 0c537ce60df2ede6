"""A search: each trial's options are drawn by what the trials before gave."""

from __future__ import annotations

import importlib.util
import math
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from denoiselab.compose import option, sweep, sweeps
from denoiselab.errors import RunHeld, UserError, one_line
from denoiselab.launcher import Launcher, Task
from denoiselab.progress import say
from denoiselab.run_folder import RunFolder, digest
from denoiselab.sweeper.base import Job, Maker, Options, Sweeper
from denoiselab.sweeper.objective import Value, mean, measured
from denoiselab.sweeper.space import Axis, axis

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

REPEATS = ("seed", "evaluation.seed")
"""Options whose values are repeats of a trial, not parameters of it."""

ABOUT_ALL = ("sweeper", "launcher", "sweep")
"""Groups that are the command's own, and no run's."""

LOCKS = ".searches"
"""The folder, beside the runs, of the locks of searches."""

SIGNALLED = 128
"""Exit statuses above it are of runs that a signal told to save and stop."""

STOPS = (signal.SIGINT, signal.SIGTERM)
"""The same, of runs that had not begun."""

AGAIN = "again"
"""What a trial that repeats a failed one says: the number of that one."""


@dataclass
class Trial:
    """One that is in hand."""

    number: int
    jobs: list[Job]


class Optuna(Sweeper):
    """Draws the options of trials with Optuna (Akiba et al. 2019, arXiv:1907.10902): ``tpe`` where the ratio of two
    densities, of good trials and of the others, is largest (Bergstra et al. 2011, NIPS).

    A trial is a run for each seed, and its value is the mean of a measurement over them, read from their evaluations.
    A new trial is drawn whenever one has ended, as long as fewer than ``parallel`` are in hand; with one in hand the
    draws follow from ``seed`` alone, interrupted or not. What is searched, and how, is the name of a search in the
    storage: the same command goes on with it until there are ``trials``, takes up what was interrupted with the same
    options, and repeats nothing. One command at a time makes a search.

    Optuna minimises the value, or its negative where higher is better.

    Args:
        metric: name of a measurement.
        trials: in all, >= 1, those of earlier commands and those that failed included.
        sampler: tpe or random.
        startup: trials of ``tpe`` that are random, >= 1.
        seed: of the draws.
        parallel: trials in hand at a time, >= 1.
        storage: URL of a data base; None for optuna.db beside the runs.
    """

    def __init__(
        self,
        metric: str,
        trials: int = 20,
        sampler: str = "tpe",
        startup: int = 10,
        seed: int = 0,
        parallel: int = 1,
        storage: str | None = None,
    ):
        for name, value in (("trials", trials), ("startup", startup), ("parallel", parallel)):
            if value < 1:
                raise UserError(f"sweeper.{name}={value}: need at least 1")
        if sampler not in ("tpe", "random"):
            raise UserError(f"sweeper.sampler={sampler}: need tpe or random")
        if importlib.util.find_spec("optuna") is None:
            raise UserError("sweeper=optuna: needs the package optuna; pip install 'denoiselab[optuna]'")
        self.metric, self.trials, self.sampler = metric, trials, sampler
        self.startup, self.seed, self.parallel, self.storage = startup, seed, parallel, storage

    def run(self, overrides: Sequence[str], maker: Maker, launcher: Launcher, options: Options) -> int:
        self.hand: list[Trial] = []
        self.pending: dict[tuple[Path, str], Job] = {}
        self.stopped_short: list[Job] = []
        self.refused: list[str] = []
        self.now_refused = False
        self.broken: UserError | None = None
        with ExitStack() as self.held:
            status = super().run(overrides, maker, launcher, options)
            return status or int(bool(self.refused) or len(self._live()) < self.trials)

    def begin(self, overrides: Sequence[str]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.lines = [line for line in overrides if option(line).partition(".")[0] not in ABOUT_ALL]
        axes = [axis(line) for line in self.lines if sweeps(line) and option(line) not in REPEATS]
        self.space: dict[str, Axis] = {option(one.key): one for one in axes}
        if not self.space:
            raise UserError(
                "sweeper=optuna: nothing to search; give an option values, as in "
                "optimizer.lr='tag(log,interval(1e-4,1e-2))' schedule=linear,cosine"
            )
        self.repeats = sweep([line for line in self.lines if sweeps(line) and option(line) in REPEATS])
        probe = self._probe(overrides)
        if probe.rerun:
            raise UserError("rerun=true: a search goes on from what there is; name=OTHER begins another")
        folder = probe.path.parent
        how = [self.metric, self.sampler, self.startup, self.seed, *sorted(self.lines)]
        name = f"{folder.name}-{digest(how)}"
        try:
            self.held.enter_context(RunFolder(folder / LOCKS / name, {}).locked())
        except RunHeld as error:
            raise RunHeld(f"another command makes this search ({error})") from None
        try:
            url = self.storage or f"sqlite:///{folder.resolve()}/optuna.db"
            self.study = optuna.create_study(storage=url, study_name=name, load_if_exists=True)
        except Exception as error:  # whatever the data base's driver raises
            raise UserError(f"sweeper.storage: {one_line(error)[:300]}") from None
        self._take_up()

    def _probe(self, overrides: Sequence[str]) -> Job:
        """A job, and every value that is known composed; an option that changes nothing is refused."""
        for one in self.space.values():
            for probe in one.probes:
                self.maker.compose(self._lines({option(probe): probe}, self.repeats[0]))
        base = self._valid()
        first = self.maker.job(base)
        beside = []
        for key, one in self.space.items():
            probe = next((probe for probe in one.probes if probe not in base), None)
            try:
                beside += [] if probe is None else [self.maker.job([probe if option(x) == key else x for x in base])]
            except UserError:
                continue  # may work beside other values
        self.maker.check([first, *beside], overrides)
        return first

    def _valid(self) -> list[str]:
        """A combination that works: the lowest values of all options, or the highest."""
        error = None
        for end in (0, -1):
            lines = self._lines({key: one.probes[end] for key, one in self.space.items()}, self.repeats[0])
            try:
                self.maker.job(lines)
            except UserError as found:
                error = error or found
            else:
                return lines
        assert error is not None
        raise error

    def _lines(self, drawn: dict[str, str], repeat: Sequence[str]) -> list[str]:
        """The overrides of one job, in the order of the command's.

        Args:
            drawn: overrides by option; an option that is not among them takes its first value.
            repeat: overrides.
        """
        chosen = {key: one.probes[0] for key, one in self.space.items()} | drawn
        chosen |= {option(line): line for line in repeat}
        return [chosen.get(option(line), line) for line in self.lines]

    def _drawn(self, trial: FrozenTrial) -> dict[str, str]:
        return {key: one.override(trial.params[key]) for key, one in self.space.items()}

    def _lost(self, trial: FrozenTrial) -> bool:
        """Whether its command was killed before its options were drawn."""
        from optuna.trial import TrialState

        return trial.state == TrialState.FAIL and trial.params.keys() != self.space.keys()

    def _live(self) -> list[FrozenTrial]:
        """Trials that count: neither lost nor repeated."""
        there = [trial for trial in self.study.get_trials(deepcopy=False) if not self._lost(trial)]
        repeated = {trial.user_attrs.get(AGAIN) for trial in there}
        return [trial for trial in there if trial.number not in repeated]

    def _take_up(self) -> None:
        """What earlier commands left: trials that were interrupted, and those that failed."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.params.keys() != self.space.keys():
                self.study.tell(trial.number, state=TrialState.FAIL)
        live = self._live()
        self.interrupted = [trial for trial in live if trial.state == TrialState.RUNNING]
        for trial in (trial for trial in live if trial.state == TrialState.FAIL):
            if self.options.retry:
                self.study.enqueue_trial(trial.params, user_attrs={AGAIN: trial.number})
            else:
                why = self.study.user_attrs.get(f"failed {trial.number}", "unknown")
                line = f"{self._name(trial)}: {why} (it failed before; sweep.retry=true tries again)"
                self.refused.append(line)
        say(f"{sum(trial.state == TrialState.COMPLETE for trial in live)} of {self.trials} trials were made before")

    def take(self, held: int) -> list[Task]:
        """Of new trials, as long as there is room in hand."""
        tasks: list[Task] = []
        while len(self.hand) < self.parallel and not self.stopped:
            trial = self.interrupted.pop(0) if self.interrupted else self._ask()
            if trial is None:
                break
            tasks += self._begin(trial)
        return tasks

    def _ask(self) -> FrozenTrial | None:
        """The next trial: one that is to be repeated, or a new one; None if there are enough."""
        from optuna.samplers import RandomSampler, TPESampler
        from optuna.trial import TrialState

        live = self._live()
        again = any(trial.state == TrialState.WAITING for trial in live)
        if len(live) >= self.trials and not again:
            return None
        seed = int(digest([self.seed, len(live)]), 16) % 2**32  # so that an interruption changes no draw
        random = self.sampler == "random"
        self.study.sampler = RandomSampler(seed) if random else TPESampler(n_startup_trials=self.startup, seed=seed)
        asked = self.study.ask({key: one.distribution for key, one in self.space.items()})
        return next(trial for trial in self.study.get_trials(deepcopy=False) if trial.number == asked.number)

    def _begin(self, trial: FrozenTrial) -> list[Task]:
        """Compose and check its runs; those that are to be made."""
        try:
            jobs = [self.maker.job(self._lines(self._drawn(trial), repeat)) for repeat in self.repeats]
        except UserError as error:
            self.refused.append(f"{self._name(trial)}: {one_line(error)}")
            self.now_refused = True
            self._fail(trial.number, one_line(error))
            return []
        tasks: list[Task] = []
        one = Trial(trial.number, [])
        for job, repeat in zip(jobs, self.repeats, strict=True):
            address = job.path, job.evaluation_address
            if address not in self.pending:  # or another trial in hand makes it
                task = self.admit(job, " ".join([f"trial {trial.number}", *repeat]))
                if task is not None:
                    self.pending[address] = job
                    tasks.append(task)
            one.jobs.append(self.pending.get(address, job))
        self.hand.append(one)
        self._settle()
        return tasks

    def ended(self, task: Task, status: int) -> None:
        job = self.jobs[task]
        del self.pending[job.path, job.evaluation_address]
        super().ended(task, status)
        if status > SIGNALLED or -status in STOPS or status == RunHeld.status:  # which another command makes
            self.stopped_short.append(job)
        self._settle()

    @property
    def stopped(self) -> bool:
        return self.broken is not None or (self.now_refused and self.options.fail_fast) or super().stopped

    def _settle(self) -> None:
        """Tell Optuna of every trial whose runs have all ended."""
        for trial in [trial for trial in self.hand if not any(job in self.left for job in trial.jobs)]:
            self.hand.remove(trial)
            if any(job in self.stopped_short for job in trial.jobs):
                continue  # for the next command
            failed = [why for job, why in self.failures if job in trial.jobs]
            try:
                if failed:
                    self._fail(trial.number, failed[0])
                else:
                    value = mean([measured(job.path, job.evaluation_address, self.metric) for job in trial.jobs])
                    self._tell(trial.number, value)
            except UserError as error:
                self.broken = self.broken or error

    def _tell(self, number: int, value: Value) -> None:
        """The value of a trial.

        Raises:
            UserError: it is another quantity than those of the trials before.
        """
        known = self.study.user_attrs.get("depends on")
        if known is None:
            self.study.set_user_attr("depends on", known := {"better": value.better, **value.basis})
        mine = {"better": value.better, **value.basis}
        if differing := [name for name in {**known, **mine} if known.get(name) != mine.get(name)]:
            raise UserError(
                f"sweeper.metric={self.metric}: numbers of trials do not compare, they differ in "
                f"{', '.join(differing)}; search by a measurement that does not depend on it, or hold it still"
            )
        if not math.isfinite(value.number):
            self.refused.append(f"trial {number}: {self.metric} is {value.number}")
            self._fail(number, f"{self.metric} is {value.number}")
            return
        self.study.tell(number, self._sign * value.number)
        told, best = self._trial(number), self.study.best_trial
        say(
            f"{self._name(told, short=True)}: {self.metric} {value.number:.5g}; best {self._value(best):.5g} of trial "
            f"{best.number} ({len(self._finished())} of {self.trials})"
        )

    def _fail(self, number: int, why: str) -> None:
        from optuna.trial import TrialState

        self.study.set_user_attr(f"failed {number}", why)
        self.study.tell(number, state=TrialState.FAIL)
        say(f"{self._name(self._trial(number), short=True)}: failed: {why} ({len(self._finished())} of {self.trials})")

    def _trial(self, number: int) -> FrozenTrial:
        return next(trial for trial in self.study.get_trials(deepcopy=False) if trial.number == number)

    def _finished(self) -> list[FrozenTrial]:
        return [trial for trial in self._live() if trial.state.is_finished()]

    @property
    def _sign(self) -> int:
        return -1 if self.study.user_attrs["depends on"]["better"] == "higher" else 1

    def _value(self, trial: FrozenTrial) -> float:
        assert trial.value is not None
        return self._sign * trial.value

    def _name(self, trial: FrozenTrial, short: bool = False) -> str:
        """A trial and its options; ``short`` with numbers of four digits."""
        drawn = self._drawn(trial).values()
        if short:
            shown = {key: value for key, value in trial.params.items() if isinstance(value, float)}
            lines = self._drawn(trial).items()
            drawn = [f"{self.space[key].key}={shown[key]:.4g}" if key in shown else line for key, line in lines]
        return f"trial {trial.number} {' '.join(drawn)}"

    def finish(self) -> None:
        """The best trial, and the commands that make it."""
        from optuna.trial import TrialState

        if self.broken is not None:
            raise self.broken
        for line in self.refused:
            say(f"failed: {line}")
        finished = self._finished()
        if len(finished) < self.trials:
            say(f"{len(finished)} of {self.trials} trials; the same command goes on")
        if not any(trial.state == TrialState.COMPLETE for trial in finished):
            return say("no trial gave a value")
        best = self.study.best_trial
        say(f"best: {self._name(best)}: {self.metric} {self._value(best):.6g}")
        for repeat in self.repeats:
            say(f"  {self.maker.job(self._lines(self._drawn(best), repeat)).command}")
        return None
