"""Taking out what matters least."""
