"""What passes between stages: the central data types and the folders they are stored in."""
