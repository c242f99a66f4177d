"""A run's log read again: what happened (`story`), whether it can be repeated (`check`), what else could have been (`what_if`)."""
