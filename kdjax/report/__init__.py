"""Reports for people: HTML pages, charts, drawn boxes, the model card."""
