"""A finished student made smaller or exported."""
