"""The trainer: data, loss, optimizer, checkpoints, the step loop over a StageExecutor."""
