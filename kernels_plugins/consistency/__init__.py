"""Two models, or one in two settings, side by side: the first layer whose bits differ."""
