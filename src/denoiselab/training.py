"""One run from its configuration to its evaluation."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from denoiselab import checkpoint, lint, trainer
from denoiselab.announcing import announce, list_skipped
from denoiselab.callbacks import Checkpoints, EarlyStopping, Inspection, ProgressBar, RankWatch, TrainingMetrics
from denoiselab.checks import check, check_used
from denoiselab.compose import JOBS, Composed, read_yaml, to_yaml, write_job
from denoiselab.content import by_content
from denoiselab.denoiser import Denoiser
from denoiselab.diagnostics import Diagnostic, Subject
from denoiselab.errors import CheckpointError, UserError, one_line
from denoiselab.evaluation import RESULT, address, evaluate
from denoiselab.experiment import Parts, identity, resolve
from denoiselab.files import remove_leftovers, write_text
from denoiselab.initial import initial, start_from
from denoiselab.inspection import Kept, folder_of, inspect
from denoiselab.launcher import Task
from denoiselab.loggers import JsonLines, evaluated, finishing
from denoiselab.loggers.facts import Facts, looked_up
from denoiselab.module import Diffusion, Feed
from denoiselab.progress import say
from denoiselab.ranks import Ranks
from denoiselab.rng import mix
from denoiselab.run import Run, devices_of, find_checkpoint
from denoiselab.run_folder import RunFolder, digest, slug
from denoiselab.version import CHECKPOINT_VERSION

OF_COMMAND = ("launcher", "sweeper", "sweep", "study", "rerun")
"""Options that change nothing of what a run's process does."""


class Job:
    """A run that is composed and checked, and can be started.

    Args:
        composed: the configuration.
        file: that it was read from, for the ranks.
        here: whether it will run on this machine; if not, what devices there are is not looked at.

    Raises:
        UserError: the configuration cannot work; nothing was written.
    """

    def __init__(self, composed: Composed, file: Path | None = None, here: bool = True):
        self.composed, self.file, self.here = composed, file, here
        self.step, self.stopped = 0, False  # where the run stands
        self.loggers: list[Logger] = []
        self.config = resolve(composed)
        config = self.config
        parts = Parts(config)
        check(parts)
        check_used(parts, composed.overrides)
        _ = parts.data.train  # a set without samples says so before anything is written
        self.start = initial(config, parts.schedule) if config["init_from"] else None
        sha = f"{config['init_weights']}:{checkpoint.sha256(self.start)}" if self.start else None
        self.identity = identity(by_content({**config, "data": parts.data.by_content(config["data"])}), sha)
        self.evaluation_address = address(config)
        self.folder = RunFolder(Path(config["output_dir"]) / config["name"] / slug(self.identity), self.identity)
        if self.start and file and not file.name.startswith(f"{self.path.name}-"):
            raise UserError(
                f"init_from={config['init_from']}: {self.start} was written anew since this run was planned, which "
                "would make it another run; issue the command again when what it starts from is done"
            )
        self.rank_zero = rank_zero_only.rank == 0  # Lightning's reading of torchrun's, SLURM's and its own variables
        self._check_batch()
        case = lint.Case(parts, folder=self.folder.path, identity=self.identity)
        self.advice = lint.look(case, training=True)

    @property
    def finished(self) -> bool:
        """Whether this was trained to its end and evaluated as it asks, going by what the run's folder says."""
        status = self.folder.read_status()
        reached = max(status.get("step", 0), status.get("max_steps", 0)) >= self.config["trainer"]["max_steps"]
        whole = status.get("state") == "done" or self._failed_in_another(status)
        done = whole and self.evaluation_address in status.get("evaluated", [])
        return done and reached and any(self.folder.path.glob("checkpoints/*.ckpt"))

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def makes(self) -> tuple[Path, str]:
        return self.path, self.evaluation_address

    @property
    def overrides(self) -> list[str]:
        return self.composed.overrides

    @property
    def command(self) -> str:
        return self.composed.command

    @property
    def rerun(self) -> bool:
        return self.config["rerun"]

    @property
    def error(self) -> str:
        """Why it failed when it was last tried; empty if it did not."""
        status = self.folder.read_status()
        failed = status.get("state") == "failed" and not self._failed_in_another(status)
        return str(status.get("error") or "unknown") if failed else ""

    def _failed_in_another(self, status: dict[str, Any]) -> bool:
        """Whether what failed, or was interrupted, is another evaluation of this run."""
        return status.get("evaluation") not in (None, self.evaluation_address)

    def _evaluated(self) -> list[str]:
        """Addresses of the evaluations that were made of this step."""
        before = self.folder.read_status()
        return before.get("evaluated", []) if before.get("step") == self.step else []

    def set_aside(self) -> None:
        if moved := self.folder.move_aside():
            say(f"moved the old run to {moved}")

    def task(self, label: str) -> Task:
        """How a launcher starts it; its composed configuration is written beside the runs."""
        nodes, ranks = self.config["trainer"]["nodes"], self.world // self.config["trainer"]["nodes"]
        return Task(label, ["train", "--job", str(self._written())], self.path, ranks, nodes, self.gpus)

    def _written(self) -> Path:
        """The file of the composed configuration."""
        if self.file is None:
            asked = {key: value for key, value in self.config.items() if key not in OF_COMMAND}
            # A file of its own for other options, so that a command cannot change what another one's jobs start from.
            name = f"{self.path.name}-{self.evaluation_address}-{digest(asked)}.json"
            self.file = self.path.parent.resolve() / JOBS / name
            self.composed.config.rerun = False  # a second start of it goes on
            write_job(self.composed, self.file)
        return self.file

    @property
    def gpus(self) -> int | None:
        """How many it asks for on each node; None for its share of all."""
        asked = self.config["trainer"]
        if asked["accelerator"] == "cpu" or (self.here and not torch.cuda.is_available()):
            return 0
        devices = asked["devices"]
        return len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else None

    def _check_batch(self) -> None:
        """The global batch must divide evenly, and there must be something to shard over; a bare Trainer knows what
        devices=auto means."""
        self.world = world = self.make_trainer([], []).world_size
        asked, batch = self.config["trainer"], self.config["data"]["batch_size"]
        if asked["strategy"] == "fsdp" and world == 1:
            raise UserError(
                "trainer.strategy=fsdp: divides a network over devices, and here is 1; need trainer.devices=2 or more, "
                "or trainer=default"
            )
        if batch % (world * asked["accumulate"]):
            raise UserError(
                f"data.batch_size={batch}: the global batch must divide by devices x accumulate = {world} x "
                f"{asked['accumulate']}"
            )

    def make_trainer(self, callbacks: list[pl.Callback], loggers: list[Logger]) -> pl.Trainer:
        folder = self.folder.path if hasattr(self, "folder") else None
        return trainer.make(self.config["trainer"], folder, callbacks, loggers, self.here)

    def run(self) -> None:
        """Train to max_steps from wherever the run stands, then evaluate."""
        if not self.rank_zero:
            self.fit()
            return
        if self.rerun:
            self.set_aside()
        steps, trained = self.config["trainer"]["max_steps"], False
        with self.folder.locked(), finishing(self.loggers):
            try:
                for folder in (self.path, self.path / "checkpoints", self.path / "pictures"):
                    remove_leftovers(folder)
                self.fit()
                checkpoint.settle(self.path / "checkpoints")
                trained = True
                self._evaluate()
            except BaseException as error:
                state = "preempted" if hasattr(error, "signum") else "failed"
                text = f"{type(error).__name__}: {one_line(error)}"
                # An evaluation that fails says nothing of the run's others, made or not.
                of = (self._evaluated(), self.evaluation_address) if trained else ([], None)
                with suppress(OSError):  # a full disk, which the error itself may be of
                    if report := getattr(error, "report", None):
                        write_text(self.path / "crash.json", json.dumps(report, indent=2) + "\n")
                    self.folder.status(state, self.step, steps, text, *of)
                raise
            if not self.finished:  # before, too: then nothing was done, and what is said of it stands
                evaluated = {*self._evaluated(), self.evaluation_address}
                self.folder.status("done", self.step, steps, evaluated=sorted(evaluated))
        print(self.folder.path, flush=True)  # alone on stdout, for scripts: run=$(denoiselab train ...)

    def fit(self) -> None:
        """Train if there is anything left to do."""
        config, trainer_config = self.config, self.config["trainer"]
        if trainer_config["threads"]:
            torch.set_num_threads(trainer_config["threads"])
        torch.set_float32_matmul_precision(trainer_config["matmul_precision"])
        steps, path = trainer_config["max_steps"], self.folder.path
        resume = self._newest()
        if self.step >= steps or self.stopped:
            say(f"{path.name}: {self.step} steps already done{', and stopped early' if self.stopped else ''}")
            return

        torch.manual_seed(mix(config["seed"], "init"))
        parts = Parts(config, folder=path)
        module = Diffusion(
            denoiser=parts.denoiser,
            schedule=parts.schedule,
            loss=parts.loss,
            timesteps=parts.timesteps,
            drop=parts.drop,
            codec=parts.codec,
            ema=parts.make("ema", open=("model",)),
            optimizer=parts.make("optimizer", open=("params",)),
            lr_schedule=parts.make("lr_schedule"),
            seed=config["seed"],
            batch_size=parts.data.batch_size,
            gradient_clip=trainer_config["gradient_clip"],
            compiled=trainer_config["compile"],
            recomputed=trainer_config["recompute"],
        )
        if self.start and resume is None:
            for line in start_from(module, self.start, config):
                say(line)
        record = {
            "version": CHECKPOINT_VERSION,
            "config": to_yaml(self.composed),
            "identity": self.identity,
            "interface": parts.interface,
            "choices": self.composed.choices,
        }
        loggers = self._loggers(parts)
        metrics = TrainingMetrics(trainer_config["log_every"])
        notice = config["launcher"].get("grace")  # only a scheduler that ends a job gives one
        saving = Checkpoints(path, record, trainer_config["checkpoint_every"], notice=notice)

        def failed(why: str) -> None:
            self.folder.status("failed", made.global_step, steps, why)
            self.folder.release()

        ranks = Ranks(rank_zero_only.rank or 0, failed if self.rank_zero else lambda why: None)
        callbacks = [
            RankWatch(path, ranks, trainer_config["hang_seconds"]),
            metrics,
            *self._optional(parts, record),
            ProgressBar(metrics),
            *self._stopping(parts, saving),
            saving,
        ]
        if self.rank_zero:
            announce(self.folder, self.composed, self.config, parts, module, self.step)
        made = self.make_trainer(callbacks, loggers)
        # Written before other ranks start, which read it.
        command = ["train", "--job", str(self._written())] if self.world > 1 and self.rank_zero else []
        feed = Feed(parts.data, config["seed"], self.step)
        try:
            with ranks.training(made, command):
                made.fit(module, datamodule=feed, ckpt_path=resume, weights_only=True)
        except Exception as error:
            if feed.loader is not None and (died := feed.loader.met_elsewhere(error)):
                raise died from None
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"trainer.compile=true: {reason}; trainer.compile=false trains all the same") from error
            raise
        finally:
            if feed.loader is not None:
                feed.loader.end()
            if self.rank_zero:
                list_skipped(parts.data, path)
            self.step = max(self.step, made.global_step)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    def _optional(self, parts: Parts, record: dict[str, Any]) -> list[pl.Callback]:
        """The callbacks that the configuration names; diagnostics among them look at the EMA weights."""
        path, config = self.folder.path, self.config
        named = [("callbacks", *item) for item in parts.callbacks(path).items()]
        named += [("diagnostics", *item) for item in parts.diagnostics.items()]

        def looking(name: str, diagnostic: Diagnostic, node: dict[str, Any]) -> Inspection:
            def look(trainer: pl.Trainer, module: Diffusion, progress: Any) -> Kept:
                learned = module.loss.state_dict()
                assert isinstance(module.ema.model, Denoiser)
                run = Run(parts, module.ema.model, trainer.global_step, "ema", path, record, learned)
                subject = Subject(run, parts, lambda: module.denoiser, self.composed.config_dir, progress)
                return inspect(diagnostic, subject, folder_of(name, node, subject))

            return Inspection(name, diagnostic, look)

        return [
            looking(name, made, config[group][name]) if isinstance(made, Diagnostic) else made
            for group, name, made in named
        ]

    def _stopping(self, parts: Parts, saving: Checkpoints) -> list[pl.Callback]:
        """Early stopping, if asked for; the last but saving, so that what it saves is the whole state of a step."""
        options = self.config["early_stopping"]
        if options["patience"] is None:
            return []
        return [EarlyStopping(parts.data.held_out, saving, options["patience"], options["every"])]

    def _newest(self) -> Path | None:
        """The checkpoint to go on from, and ``step``; its content is not kept, which is four times the network."""
        found = checkpoint.newest(self.folder.path / "checkpoints", warn=lambda line: say(f"warning: {line}"))
        if found is None:
            return None
        file, content = found
        if content["denoiselab"].get("identity") != self.identity:
            raise CheckpointError(f"{file}: belongs to another run than {self.folder.path.name}; move it away")
        self.step = content["global_step"]
        self.stopped = bool(content.get("callbacks", {}).get(EarlyStopping.__name__, {}).get("stopped"))
        return file

    def _loggers(self, parts: Parts) -> list[Logger]:
        """Those of this run, made once."""
        path, choices = self.folder.path, self.composed.choices
        text = read_yaml(to_yaml(self.composed), "the configuration")
        study = choices.get("study", "none")
        group = self.config["name"] if study == "none" else study
        facts = Facts(text, choices, self.overrides, looked_up(text, self.config), group, self.folder.revision())
        shared = {"save_dir": path, "id": path.name.rpartition("-")[2], "name": path.name}
        shared |= {"facts": facts, "step": self.step}
        nodes = [(f"logger.{name}", node) for name, node in self.config["logger"].items() if node]
        if not self.loggers:
            self.loggers += [JsonLines(path, self.step), *(parts.make(name, node, **shared) for name, node in nodes)]
        return self.loggers

    def _evaluate(self) -> None:
        """Measure the run as the command asks, unless that was done before."""
        config = self.config
        parts = Parts(config)
        file = find_checkpoint(self.folder.path)
        content = checkpoint.load(file)
        run = Run.of(parts, content, config["evaluation"]["weights"], file, self.folder.path)
        device = "cpu" if config["trainer"]["accelerator"] == "cpu" else "auto"
        run.to(*devices_of(device, config["trainer"]["devices"]))
        before = {file.parent for file in self.path.glob(f"evaluations/*/{RESULT}")}
        trained = bool(self.loggers)
        made = evaluate(run, parts, rerun=False, choices=self.composed.choices)
        evaluated(self._loggers(parts), made, new=trained or made not in before)
