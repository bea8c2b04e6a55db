"""The least that a verdict can rest on. --help names these numbers, so nothing is imported here."""

BLOCKS = 8  # of a timing: fewer cannot tell noise from change
RUNS = 3  # of a golden's case: fewer cannot show that runs agree
