"""What each job should be, given what is there: pure functions, called after every change."""
