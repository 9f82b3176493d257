"""Tests of models/surgery/."""
