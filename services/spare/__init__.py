"""A spare: an instance without a role, for the controller to use."""
