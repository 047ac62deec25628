"""An instance: one process with one loaded model that plays a role. What each role does is in services/<role>/role.py."""
