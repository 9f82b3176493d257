"""Many runs: studies, sweeps, search, lottery tickets."""
