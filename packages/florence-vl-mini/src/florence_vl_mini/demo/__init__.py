"""The demo: fine-tune the included mini Florence-VL on a new task offline, in minutes, with a report."""
