"""metrics.jsonl: a line for every so many steps, none lost and none twice."""

import math
import time

import jax
from etils import epath

from dtrak_jax import files, parallel
from dtrak_jax.training.config import TrainConfig
from dtrak_jax.training.step import learning_rate

REMOTE_SECONDS = 60
"""The least time between two writes of the file on gs://, where nothing is appended."""


class Metrics:
    """Writes the file of a run that begins, or goes on, after step `start`."""

    def __init__(self, path: epath.PathLike, start: int, config: TrainConfig):
        self.path, self.every = files.at(path), config.log_every
        self.rate = jax.jit(learning_rate(config))
        self.start, self.step, self.time = start, start, time.time()
        lines = files.read_json_lines(self.path) if self.path.exists() else []
        # Steps after the checkpoint are done again, and their lines written again.
        self.lines = [line for line in lines if line["step"] <= start]
        self.written, self.write_time = 0, 0.0

    def write(self, step: int, loss_sum: jax.Array) -> float:
        """Adds the line of a step; returns the mean loss since the line before.

        Raises:
          FloatingPointError: the loss is not finite.
        """
        before = (step - 1) // self.every * self.every
        if before < self.start and self.lines:
            # The sum began at the last line, which another setting may have decided.
            before = self.lines[-1]["step"]
        loss, now = float(loss_sum) / (step - before), time.time()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss became {loss} between steps {before} and {step}; "
                "try a smaller train.learning_rate."
            )
        rate, speed = self.rate(step - 1), (step - self.step) / (now - self.time)
        line = {"step": step, "loss": loss, "learning_rate": float(rate)}
        self.lines.append(line | {"steps_per_second": speed})
        self.step, self.time = step, now
        if not files.is_remote(self.path) or now > self.write_time + REMOTE_SECONDS:
            self.flush()
        return loss

    def flush(self) -> None:
        """Writes all lines so far; a checkpoint must not be saved before its lines.

        The first write replaces the file, in which a killed run may have left half a
        line; later ones append to it, each in one write. On gs:// all replace it.
        """
        new = self.lines[self.written :]
        if not new or not parallel.is_main_process():
            return
        if self.written and not files.is_remote(self.path):
            files.append_json_lines(self.path, new)
        else:
            files.write_json_lines(self.path, self.lines)
        self.written, self.write_time = len(self.lines), time.time()
