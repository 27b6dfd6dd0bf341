"""What a run would take on devices that are not there: memory, time, and what to change if it does not fit."""
