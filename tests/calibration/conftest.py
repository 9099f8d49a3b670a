import pytest

import vmeanba_fx
from tests import zoo


@pytest.fixture(scope="module")
def captured():
    """A captured model with three live sites; ``calibrate`` takes it as it is and does not trace again."""
    return vmeanba_fx.capture(zoo.live(3), zoo.images(4))
