"""An instance: one process, one loaded model, one role at a time. What a role does is in services/<role>/role.py."""
