"""What runs on the workstation: sessions to windows, training, evaluation."""
