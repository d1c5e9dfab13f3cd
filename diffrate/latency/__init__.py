"""What a schedule costs in seconds on the machine at hand: measured part by part, predicted as a whole."""
