"""From a dense model to a converted one: calibrate, plan, convert, and measure what that cost."""
