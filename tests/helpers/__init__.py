"""What several test files need: commands run quickly, small runs, images, faults."""
