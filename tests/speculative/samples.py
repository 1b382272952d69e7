"""Valid and invalid inputs of every operator of the core."""

from tests.speculative import samples_kv, samples_verify

VALID = {**samples_kv.VALID, **samples_verify.VALID}
INVALID = {**samples_kv.INVALID, **samples_verify.INVALID}
