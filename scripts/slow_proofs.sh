#!/usr/bin/env bash
# The proofs too long for every commit; their result is recorded in docs/log.md.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python -m pytest -m slow "$@"
