"""What to do next, as pure functions of what was seen: no socket, clock, file or torch in here."""
