"""Parameter groups per stage and learning-rate schedules."""
