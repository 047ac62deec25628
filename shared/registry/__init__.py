"""The registry in Redis: who is there, in which group and role, and whether its heart still beats."""
