"""What is checked on a node before step 0."""
