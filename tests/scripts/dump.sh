python3 "$(dirname "$0")/dump.py" "$@"
