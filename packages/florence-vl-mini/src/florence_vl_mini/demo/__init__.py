"""The demo: the shipped mini Florence-VL learns a new task offline, in minutes, with a report to look at."""
