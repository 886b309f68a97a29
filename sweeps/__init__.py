"""Many runs: wandb's sweep files (`*.yaml`), and the launcher that expands and runs them without wandb.

Beside the grids: `sweep_files.py` reads them, `launch.py` is the command, `local.py` and `slurm.py` are where runs go,
`run.py` is what wandb's agents start. Everything that a run does is main.py's business.
"""
