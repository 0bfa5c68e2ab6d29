"""What stops a run, told so that a person knows what to do next."""


class TrainingError(ValueError):
    """Training cannot go on; the message says why and what to change."""


class NonFiniteError(TrainingError):
    """Too many skipped steps in a row."""

    def __init__(self, step: int, in_a_row: int, rows: str):
        super().__init__(
            f"{in_a_row} steps in a row, up to step {step}, had a loss or gradient that was not finite (batch rows {rows}).\n"
            "  Accepted: finite ones, at least once in train.max_nonfinite_steps. All checkpoints are intact.\n"
            "  In another --workdir, lower optimizer.learning_rate, lengthen schedule.warmup_steps, or leave out the documents behind"
            " these rows."
        )
