"""A job seen from outside its training: what it runs on, how fast its link is, what to fix. `launch/doctor.py`."""
