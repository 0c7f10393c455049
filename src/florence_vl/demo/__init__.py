"""The demo: a small Florence-VL built, trained and questioned offline on real parts, with a report to look at."""
