"""What other programs get to see of a job."""
