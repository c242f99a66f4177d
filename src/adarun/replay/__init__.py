"""A run's log read again: what happened (`story`), can it be repeated (`check`), what else could have been (`what_if`)."""
