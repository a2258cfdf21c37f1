"""Laws and forecasts: pure, causal functions of the numbers in a log, online and in replay."""
