"""What the network is compared with, each fitted on the same splits: one method per file."""
