"""What is done to features on their way from the backbone to the head."""
