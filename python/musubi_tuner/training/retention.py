"""Which saved files stay: options of states and of rotation, and the rule that names what has become old.

The rule is the established one. `save_last_n_epochs = k` keeps the k newest epoch files; `save_last_n_steps = n` keeps
step files of the last n steps, whatever their number. The `_state` forms say the same of state folders, and follow the
plain ones where they are not given. Only files that the rule itself names are removed, and only after newer ones lie
complete on the disk; the files of the end of a run are never among them.
"""

from __future__ import annotations

from dataclasses import dataclass

from musubi_tuner.config.options import option


@dataclass(frozen=True)
class StateOptions:
    """States and resuming"""

    save_state: bool = option(False, help="with every saved file, also save a state that the run can go on from")
    save_state_on_train_end: bool = option(False, help="save a state at the end, also without save_state")
    save_last_n_epochs: int | None = option(None, help="keep the files of the last n saved epochs", minimum=1)
    save_last_n_epochs_state: int | None = option(
        None, help="the same for states; save_last_n_epochs if not given", minimum=1
    )
    save_last_n_steps: int | None = option(None, help="keep step files of the last n steps", minimum=1)
    save_last_n_steps_state: int | None = option(
        None, help="the same for states; save_last_n_steps if not given", minimum=1
    )
    resume: str | None = option(None, help="state folder to go on from", metavar="FOLDER")
    reset_counters: bool = option(False, help="with resume: take weights and optimizer, and count steps from 0")
    initial_step: int | None = option(None, help="count steps from here, whatever the state says", minimum=0)

    def retention(self, every_epochs: int | None, every_steps: int | None) -> Retention:
        """The rule for files that are saved at these intervals."""
        return Retention(
            every_epochs,
            every_steps,
            self.save_last_n_epochs,
            self.save_last_n_steps,
            self.save_last_n_epochs_state or self.save_last_n_epochs,
            self.save_last_n_steps_state or self.save_last_n_steps,
        )


@dataclass(frozen=True)
class Retention:
    """Intervals of saving, and how much stays of files and of states; None keeps all."""

    every_epochs: int | None = None
    every_steps: int | None = None
    last_epochs: int | None = None
    last_steps: int | None = None
    last_epochs_state: int | None = None
    last_steps_state: int | None = None

    def old_epoch(self, epoch: int, *, state: bool = False) -> int | None:
        """The epoch whose file is no longer kept once that of `epoch` is saved."""
        last = self.last_epochs_state if state else self.last_epochs
        if last is None or self.every_epochs is None:
            return None
        old = epoch - self.every_epochs * last
        return old if old > 0 else None

    def old_step(self, step: int, *, state: bool = False) -> int | None:
        """The step whose file is no longer kept once that of `step` is saved."""
        last = self.last_steps_state if state else self.last_steps
        if last is None or self.every_steps is None:
            return None
        old = (step - last - 1) // self.every_steps * self.every_steps
        return old if old > 0 else None
