"""From one file to the tables of both protocols: named steps, each left under a final name and
never done twice."""
