"""The database goes away, in the middle of any step: what was promised still holds, counted."""
