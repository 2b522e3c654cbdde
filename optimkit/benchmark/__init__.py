"""``python -m optimkit.benchmark <table>``: what methods cost, as ratios taken in one run."""
