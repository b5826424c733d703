"""Pure geometry: boxes, priors, assignment, suppression."""
