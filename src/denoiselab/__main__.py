"""python -m denoiselab"""

from denoiselab.cli import main

main()
