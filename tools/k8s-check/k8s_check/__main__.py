from k8s_check.main import main

raise SystemExit(main())
