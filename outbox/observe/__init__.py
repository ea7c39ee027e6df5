"""What an operator sees: whether the tables fit, what waits and why, where one message is."""
