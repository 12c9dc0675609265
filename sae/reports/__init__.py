"""Pages and charts: the HTML frame, charts as SVG, a training run's curves."""
