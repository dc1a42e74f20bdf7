"""`python -m service.jobs.runner JOB ATTEMPT ROOT`: stable entry point of a job's driver, used by running clusters."""

import sys

from service.jobs.execution.driver import main

if __name__ == "__main__":
    sys.exit(main())
