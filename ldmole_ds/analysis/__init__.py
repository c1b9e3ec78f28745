"""Looking at a job from outside its training: what machine it runs on, how fast its link is, what to fix."""
