"""Reports, loss landscapes, dataset checks and view sheets."""
