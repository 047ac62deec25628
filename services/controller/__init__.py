"""The controller: watches the registry and knows the state of every group. Requests do not pass through it."""
