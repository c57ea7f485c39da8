from devstack.main import main

raise SystemExit(main())
